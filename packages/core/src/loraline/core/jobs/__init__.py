"""Long work: records in a database, runners that claim them, and the child processes that do it."""
