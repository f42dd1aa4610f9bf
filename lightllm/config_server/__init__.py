"""The directory of pd_masters: a process without a model that nodes and masters find each other by."""
