"""What happens to an image and its labels before the network sees them."""
