// Package quickstart holds the two apps that the quickstart imports, with their
// developers and products, and the names that a tour of them needs.
//
// The consumer keys below are examples: they open nothing but the quickstart.
package quickstart

import (
	"embed"
	"fmt"

	"keygate/authz"
)

//go:embed catalog.json weather-app.json orders-app.json
var files embed.FS

// CatalogFile has the developers of the apps, and the products on their keys.
const CatalogFile = "catalog.json"

// Products that the quickstart's routes name.
const (
	WeatherProduct authz.ProductName = "Weather-Product"
	OrdersProduct  authz.ProductName = "Orders-Product"
)

// The app of Apigee's page "Revoking and approving developer app keys". Its key
// is approved, its one product, WeatherProduct, is revoked on it.
const (
	WeatherFile                        = "weather-app.json"
	WeatherApp       authz.AppID       = "6ed3a4d1-4733-439a-80a4-0d71149ec9ad"
	WeatherDeveloper authz.DeveloperID = "Z2S37rxX2Suzkwtg"
	WeatherEmail                       = "weather@example.com"
	WeatherKey                         = "giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb"
)

// An app of another developer with two keys. Both are approved for
// WeatherProduct; OrdersKey is approved for OrdersProduct too,
// OrdersPendingKey still waits for that.
const (
	OrdersFile                         = "orders-app.json"
	OrdersApp        authz.AppID       = "b1c0f2ce-0c1b-4f0e-8a54-3d0f6f3f9a77"
	OrdersDeveloper  authz.DeveloperID = "Qm7XcL0fPz4KtRwa"
	OrdersKey                          = "Vq3mWk9TzB1xYc7RfJ5nLd2HsG8pEu4A"
	OrdersPendingKey                   = "hD8sKp2LgN6vXa0QwZ4tCe9RyM1bJf7U"
)

// Files returns the names of the apps' files, in the order of their import.
func Files() []string { return []string{WeatherFile, OrdersFile} }

// Read returns the bytes of CatalogFile or one of Files; they are the caller's. It panics for
// any other name.
func Read(name string) []byte {
	data, err := files.ReadFile(name)
	if err != nil {
		panic(fmt.Sprintf("quickstart: %v", err))
	}
	return data
}

// KeyID returns the name of one of the package's consumer keys.
func KeyID(key string) authz.KeyID {
	k, reason := authz.ParseConsumerKey(key)
	if reason != authz.Allowed {
		panic("quickstart: not one of the package's keys")
	}
	return k.ID()
}
