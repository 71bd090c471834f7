"""Exports for other runtimes, as far as files and texts go: chat templates, Modelfiles, licences. No torch here."""
