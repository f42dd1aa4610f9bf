"""The client side: load driver, statistics and terminal chat. Knows servers only by their HTTP interface."""
