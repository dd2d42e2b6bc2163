"""The training report: one HTML page that holds its charts and pictures and loads nothing."""
