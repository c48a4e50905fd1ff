"""Models of transformers: loading, finding and replacing layers, saving in other layouts."""
