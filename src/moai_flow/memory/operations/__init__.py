"""What a store can do, a module a subject. They share the scope, and never call each other."""
