"""Reports on runs: records, figures, timeline, page."""
