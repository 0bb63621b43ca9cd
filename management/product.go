package management

import (
	"net/http"
	"slices"

	"keygate/apigee"
	"keygate/catalog"
	"keygate/ledger"
)

func shownProduct(p ledger.Product) apigee.Product {
	return apigee.Product{Product: p.Product, LastModifiedAt: p.LastModified}
}

func (c *call) renderProduct(p ledger.Product) []byte { return c.edition.Product(shownProduct(p)) }

func (c *call) listProducts() (answer, error) {
	expand, err := c.query.flag("expand", false)
	if err != nil {
		return answer{}, err
	}
	count, err := c.query.page(maxPage, "count")
	if err != nil {
		return answer{}, err
	}
	found, err := c.cfg.Ledger.Products(c.ctx, c.org, ledger.ProductQuery{
		StartKey: c.query.get("startKey"), Count: count, Expand: expand,
		AttributeName: c.query.get("attributename"), AttributeValue: c.query.get("attributevalue"),
	})
	if err != nil {
		return answer{}, err
	}
	shown := make([]apigee.Product, 0, len(found))
	for _, p := range found {
		shown = append(shown, shownProduct(p))
	}
	return answer{body: c.edition.Products(shown, expand)}, nil
}

// getProduct answers a product, or as Edge does who holds it.
func (c *call) getProduct() (answer, error) {
	if c.query.has("query") || c.query.has("entity") {
		return c.listHolders()
	}
	p, err := c.cfg.Ledger.Product(c.ctx, c.org, c.product())
	if err != nil {
		return answer{}, err
	}
	return answer{body: c.renderProduct(p), etag: p.Revision}, nil
}

func (c *call) listHolders() (answer, error) {
	if _, err := c.query.word("query", "list"); err != nil {
		return answer{}, err
	}
	entity, err := c.query.word("entity", "apps", "keys")
	switch {
	case err != nil:
		return answer{}, err
	case entity == "" || !c.query.has("query"):
		return answer{}, invalid("?entity", "want query=list with entity=apps or entity=keys")
	}
	holders, err := c.cfg.Ledger.ProductHolders(c.ctx, c.org, c.product())
	if err != nil {
		return answer{}, err
	}
	names := []string{}
	for _, h := range holders {
		if entity == "apps" {
			names = append(names, string(h.App))
		} else {
			names = append(names, "sha256:"+h.Key.String())
		}
	}
	slices.Sort(names)
	return answer{body: marshal(slices.Compact(names))}, nil
}

func (c *call) createProduct() (answer, error) {
	p, err := apigee.ParseProduct(c.body, "")
	if err != nil {
		return answer{}, err
	}
	return change(c, http.StatusCreated, c.renderProduct, func(by ledger.By) (ledger.Product, ledger.Done, error) {
		return c.cfg.Ledger.CreateProduct(c.ctx, by, c.org, p)
	})
}

func (c *call) updateProduct() (answer, error) {
	p, err := apigee.ParseProduct(c.body, c.product())
	if err != nil {
		return answer{}, err
	}
	return change(c, http.StatusOK, c.renderProduct, func(by ledger.By) (ledger.Product, ledger.Done, error) {
		return c.cfg.Ledger.UpdateProduct(c.ctx, by, c.org, p)
	})
}

func (c *call) deleteProduct() (answer, error) {
	return change(c, http.StatusOK, c.renderProduct, func(by ledger.By) (ledger.Product, ledger.Done, error) {
		return c.cfg.Ledger.DeleteProduct(c.ctx, by, c.org, c.product())
	})
}

// holder is whose attributes the path is about.
func (c *call) holder() ledger.Holder {
	h := ledger.Holder{App: c.params["app"], Product: c.params["product"]}
	if _, there := c.params["developer"]; there {
		h.Developer = c.developer()
	}
	return h
}

// attributes that are there, and the revision of what has them.
func (c *call) attributes() ([]catalog.Attribute, int64, error) {
	switch h := c.holder(); {
	case h.Product != "":
		p, err := c.cfg.Ledger.Product(c.ctx, c.org, c.product())
		return catalog.Attributes(p.Details), p.Revision, err
	case h.App != "":
		a, err := c.cfg.Ledger.DeveloperApp(c.ctx, c.org, h.Developer, h.App)
		return catalog.Attributes(a.Details), a.Revision, err
	default:
		d, err := c.cfg.Ledger.Developer(c.ctx, c.org, h.Developer)
		return catalog.Attributes(d.Details), d.Revision, err
	}
}

func (c *call) listAttributes() (answer, error) {
	all, revision, err := c.attributes()
	if err != nil {
		return answer{}, err
	}
	return answer{body: c.edition.Attributes(all), etag: revision}, nil
}

func (c *call) getAttribute() (answer, error) {
	all, revision, err := c.attributes()
	if err != nil {
		return answer{}, err
	}
	for _, a := range all {
		if a.Name == c.params["attribute"] {
			return answer{body: c.edition.Attribute(a), etag: revision}, nil
		}
	}
	return answer{}, &ledger.Error{Kind: ledger.NotFound, Code: "organizations.keymanagement.AttributeDoesntExist", Message: "there is no attribute of this name"}
}

func (c *call) setAttributes() (answer, error) {
	all, err := apigee.ParseAttributes(c.body)
	if err != nil {
		return answer{}, err
	}
	return change(c, http.StatusOK, c.edition.Attributes, func(by ledger.By) ([]catalog.Attribute, ledger.Done, error) {
		return c.cfg.Ledger.SetAttributes(c.ctx, by, c.org, c.holder(), all)
	})
}

func (c *call) setAttribute() (answer, error) {
	one, err := apigee.ParseAttribute(c.body, c.params["attribute"])
	if err != nil {
		return answer{}, err
	}
	return change(c, http.StatusOK, c.edition.Attribute, func(by ledger.By) (catalog.Attribute, ledger.Done, error) {
		return c.cfg.Ledger.SetAttribute(c.ctx, by, c.org, c.holder(), one)
	})
}

func (c *call) deleteAttribute() (answer, error) {
	return change(c, http.StatusOK, c.edition.Attribute, func(by ledger.By) (catalog.Attribute, ledger.Done, error) {
		return c.cfg.Ledger.DeleteAttribute(c.ctx, by, c.org, c.holder(), c.params["attribute"])
	})
}
