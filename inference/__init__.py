"""How models are used: from frames to text, from recordings to answers, in batches and in streams."""
