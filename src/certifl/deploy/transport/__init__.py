"""Messages between server and clients: schemas, encoding, Flower."""
