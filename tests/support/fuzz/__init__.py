"""What `make fuzz` and the tests of decoders feed to decoders."""
