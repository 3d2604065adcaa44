"""What an autoencoder keeps of a picture: the chart, measured as an optical instrument is, and the preflight."""
