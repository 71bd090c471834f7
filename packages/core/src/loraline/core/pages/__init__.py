"""Self-contained HTML pages for reports: no scripts, nothing loaded from elsewhere, readable in light and dark."""
