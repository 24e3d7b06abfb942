"""What all packages share; imports none of them."""
