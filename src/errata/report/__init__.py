"""What a person looks at: tables, a page, figures and a card. Reads result files only, never a model."""
