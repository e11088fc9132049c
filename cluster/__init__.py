"""What runs where: configuration root, topology, placement, supervision, launching and the command line."""
