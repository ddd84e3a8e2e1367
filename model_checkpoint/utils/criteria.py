"""In which direction metrics are better, by their names."""

MINIMISED = ("loss", "error", "perplexity", "mae", "mse", "rmse", "wer", "cer")  # ends of names of which less is better
