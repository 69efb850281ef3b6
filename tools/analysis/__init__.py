"""What a model's memory did with a text: measures, their page, plots and numbers."""
