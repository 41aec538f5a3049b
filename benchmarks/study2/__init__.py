"""The second study of alignment methods: eight methods, growth with pairs and with beta, two judges."""
