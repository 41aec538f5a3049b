"""The wire: protocol buffers of every Milonga service, with the stubs generated from them."""
