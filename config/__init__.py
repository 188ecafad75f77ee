# A package, so that one config can build on another: `from config.stack import *`.
