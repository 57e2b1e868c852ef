"""What stands in for measuring: sensitivity scores, fitted loss and latency models, their intervals."""
