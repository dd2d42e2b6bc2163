"""What the network is made of; `network.py` puts it together."""
