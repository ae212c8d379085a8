"""The training tasks that the scripts partition: data, model shapes and the loop's batches."""
