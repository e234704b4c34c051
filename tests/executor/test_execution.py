"""The kernels' own tests with compiled kernels, which are executed here instruction by instruction."""

import re
from pathlib import Path

import pytest
import torch

from fastbert.tuning.problems import COMPILED
from fastbert_kernels.backend import INTERPRETED
from tests.executor.model_steps import STEPS, Step, by
from tests.helpers.uninterpreted import run_uninterpreted

KERNELS = {"_column_sums"} | {kernel.__name__ for kernel in COMPILED.values()}

#: A few of every kernel's tests, in each dtype.
FEW = (
    "test_attention and test_head_dims and 64-dtype2",
    "test_attention and test_head_dims and 32-dtype0",
    "test_attention and test_probs_and_their_gradient and True-dtype2-all",
    "test_relation and test_lengths_around_a_tile and lengths0-triton-dtype2",
    "test_layer_norm and test_widths and 0.2-768-dtype2",
    "test_layer_norm and test_widths and 0.0-37-dtype1",
    "test_embedding and test_widths and 0.2-768-dtype2",
    "test_bias_activation and test_widths and gelu-768-dtype2",
    "test_feed_forward and test_tokens and 65-dtype2",
    "test_column_sums and test_sums_are_those_of_the_columns and 2-dtype0",
)

ABOUT_THE_HOST = ("backend", "block_records", "compile", "launch", "launched", "onednn", "tuned")
FILES = sorted(
    file.name
    for file in (Path(__file__).parents[1] / "kernels").glob("test_*.py")
    if file.stem.removeprefix("test_") not in ABOUT_THE_HOST
)


def execute(*options: str) -> tuple[int, set[str]]:
    """How many tests passed, and which kernels were launched."""
    shown = run_uninterpreted("-m", "pytest", "-p", "tests.executor.plugin", "-p", "no:cacheprovider", *options)
    passed = re.search(r"(\d+) passed", shown)
    assert passed is not None, shown[-2000:]
    return int(passed[1]), set(re.findall(r"^(\w+): \d+ launches$", shown, re.MULTILINE))


def test_a_few_calls_of_every_kernel() -> None:
    passed, launched = execute("tests/kernels", "-k", " or ".join(f"({words})" for words in FEW))
    assert passed >= len(FEW)
    assert launched == KERNELS


@pytest.mark.slow
def test_the_static_report_counts_what_kernels_do() -> None:
    options = ("--target", "sm_80", "--kernel", "column_sums", "--execute")
    shown = run_uninterpreted("-m", "bench.static", *options)
    table = shown.partition("What the kernels do on sm_80")[2]
    (row,) = (line for line in table.splitlines() if "column_sums bfloat16 768" in line)
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    assert float(cells[1]) > 0  # additions
    assert cells[-4:-2] == ["1.00", "1.00"]  # sectors of loads and stores, of the fewest


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_kernel_s_tests(file: str) -> None:
    passed, launched = execute(f"tests/kernels/{file}")
    assert passed > 10
    assert launched


@pytest.fixture(scope="module")
def executed_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[Step, list[torch.Tensor]]:
    """Steps of training in which every kernel of a model takes part."""
    file = tmp_path_factory.mktemp("steps") / "steps.pt"
    run_uninterpreted("-m", "tests.executor.model_steps", str(file))
    steps, launched = torch.load(file)
    assert launched == KERNELS - {"relation_forward", "relation_backward_a", "relation_backward_b"}
    return dict(zip(STEPS, steps, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels are compared with interpreted ones")
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_two_layers_in_training(step: Step, executed_steps: dict[Step, list[torch.Tensor]]) -> None:
    """Against float64 as far off as plain PyTorch; with dropout, whose masks it draws alike, as the interpreter."""
    dropped = step.dropout_p > 0
    truth = step._replace(dtype=torch.float32) if dropped else step._replace(dtype=torch.float64)
    exact, other = by("triton" if dropped else "torch", truth), by("triton" if dropped else "torch", step)
    for mine, theirs, right in zip(executed_steps[step], other, exact, strict=True):
        error, allowed = ((x.double() - right).abs().max().item() for x in (mine, theirs))
        # The gradient of the keys' bias is 0: what is left of terms that are not small.
        assert error <= 2 * allowed + 3e-5 * max(1.0, right.abs().max().item())
