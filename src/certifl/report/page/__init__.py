"""One self-contained HTML page: its sections, panels and explorer."""
