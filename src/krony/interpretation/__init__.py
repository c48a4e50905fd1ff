"""What each factor of a compressed model does on a text, and the page that shows it."""
