"""Runs the migrations on the connection that `Database.migrate` hands over, inside its transaction."""

from alembic import context

from loraline.core.db.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=connection.dialect.name == "sqlite")
with context.begin_transaction():
    context.run_migrations()
