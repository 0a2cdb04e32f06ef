"""What the challenge says: classes, crops, annotation states, the catalog of a data root, the phantom."""
