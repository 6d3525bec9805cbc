"""The network: Pattention, attention, the layer, and the list of layers that a pipeline is cut from."""
