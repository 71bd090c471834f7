"""The platform's database: SQLite on one machine, Postgres for many replicas."""
