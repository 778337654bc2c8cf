"""Looking inside a model: what it holds, and where. Nothing here changes a model."""
