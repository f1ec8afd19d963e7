"""What a training minimises: one module a system."""
