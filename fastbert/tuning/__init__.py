"""Tiles chosen by measurement on the user's GPU: what `fastbert tune` does. Nothing else imports this."""
