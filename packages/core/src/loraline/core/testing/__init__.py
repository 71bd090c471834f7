"""Real servers for tests: S3 (rclone) and Postgres, started from plain Python packages, without root or network."""
