"""Other projects' files, read without their code and without running what a pickle says."""
