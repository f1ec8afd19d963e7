"""What is trained: one script a task."""
