"""The paper: networks, losses, data, and the loop that trains them."""
