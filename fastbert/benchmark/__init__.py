"""Time models on the workloads people run, against the peers people use. `fastbert bench` and the runs in `bench/`."""
