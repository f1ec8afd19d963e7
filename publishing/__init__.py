"""What leaves: cards, reports, pictures, and the way to the Hub."""
