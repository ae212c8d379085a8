"""The training tasks that the scripts share: data, model shapes and the loop's batches."""
