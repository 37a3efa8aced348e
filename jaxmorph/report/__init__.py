"""A run read back: records, figures, timeline, page."""
