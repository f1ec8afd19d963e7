"""From audio on disk or on the Hub to batches."""
