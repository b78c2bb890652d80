// Package lint is the house rules as a Go test: formatting, vet, staticcheck, import
// direction, generated code, and what people promise and forget.
//
// A rule holds for every file of the module; each exception stands in the test with its
// reason, and one that is no longer needed fails the test too.
package lint
