"""Attention maps to look at: as a picture (`heatmap`), or as a page for a browser (`page`)."""
