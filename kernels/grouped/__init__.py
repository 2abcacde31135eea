"""Products of rows grouped by expert with the experts' weights: what the experts' feed-forward is made of."""
