"""The score normalisation of Pattention."""
