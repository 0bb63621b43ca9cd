package server

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"keygate/audit"
	"keygate/authz"
	"keygate/statestore"
)

// metrics of one replica, in a registry of its own.
type metrics struct {
	registry *prometheus.Registry
	checks   [authz.NumReasons]prometheus.Counter
	latency  prometheus.Histogram
	fence    prometheus.Histogram
	// clockBack counts what wallClock sees.
	clockBack prometheus.Counter
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "keygate_check_duration_seconds", Help: "Time to answer a check, from the decoded request to the response.",
			Buckets: []float64{5e-6, 10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3},
		}),
		fence: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "keygate_event_fence_seconds", Help: "Time from the arrival of a batch of watch events to its last fence.",
			Buckets: []float64{1e-6, 2.5e-6, 5e-6, 10e-6, 25e-6, 50e-6, 100e-6, 1e-3, 10e-3, 100e-3},
		}),
		clockBack: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "keygate_clock_backward_jumps_total", Help: "Times that the wall clock, which the expiry of keys follows, went back by more than a second.",
		}),
	}
	checks := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "keygate_checks_total", Help: "Checks answered, by decision and reason.",
	}, []string{"decision", "reason"})
	for r := range authz.NumReasons {
		decision := "denied"
		if r == authz.Allowed {
			decision = "allowed"
		}
		m.checks[r] = checks.WithLabelValues(decision, r.String())
	}
	m.registry.MustRegister(checks, m.latency, m.fence, m.clockBack,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) decided(d authz.Decision, took time.Duration) {
	r := d.Reason
	if r >= authz.NumReasons {
		r = authz.Internal
	}
	m.checks[r].Inc()
	m.latency.Observe(took.Seconds())
}

func (m *metrics) applied(_ int, took time.Duration) { m.fence.Observe(took.Seconds()) }

// watch adds the figures of a store.
func (m *metrics) watch(s *statestore.Store) { m.registry.MustRegister(storeCollector{s}) }

// storeCollector reads one Status a scrape.
type storeCollector struct{ store *statestore.Store }

// figure is one metric of a store.
type figure struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(statestore.Status) float64
}

var figures = func() (fs []figure) {
	add := func(kind prometheus.ValueType, name, help string, value func(statestore.Status) float64) {
		fs = append(fs, figure{prometheus.NewDesc("keygate_"+name, help, nil, nil), kind, value})
	}
	gauge := func(name, help string, value func(statestore.Status) float64) {
		add(prometheus.GaugeValue, name, help, value)
	}
	counter := func(name, help string, value func(statestore.Status) int64) {
		add(prometheus.CounterValue, name+"_total", help, func(s statestore.Status) float64 { return float64(value(s)) })
	}
	gauge("fresh", "1 while a proof of freshness is valid; at 0 every check that needs a record is refused.", func(s statestore.Status) float64 {
		if s.Fresh {
			return 1
		}
		return 0
	})
	gauge("proof_age_seconds", "Age of the last proof of freshness; -1 before the first.", func(s statestore.Status) float64 {
		if s.ProofAge < 0 {
			return -1
		}
		return s.ProofAge.Seconds()
	})
	gauge("staleness_budget_seconds", "Greatest age of a proof that still answers.", func(s statestore.Status) float64 { return s.StalenessBudget.Seconds() })
	gauge("applied_revision", "Revision of etcd up to which the watch has been applied.", func(s statestore.Status) float64 { return float64(s.AppliedRevision) })
	gauge("registered", "1 while the replica is registered, so that receipts count on it; 0 while it is not, -1 with --register=false.", func(s statestore.Status) float64 {
		switch s.Registration {
		case statestore.Registered:
			return 1
		case statestore.RegistrationOff:
			return -1
		}
		return 0
	})
	gauge("acknowledged_revision", "Newest revision that the replica has acknowledged to a receipt.", func(s statestore.Status) float64 { return float64(s.Acknowledged) })
	gauge("epoch", "Histories followed since the start: above 1 after a restore or another cluster.", func(s statestore.Status) float64 { return float64(s.Epoch) })
	gauge("index_ready", "1 while checks are answered from the index, a copy of all records; 0 while they are read through the cache.", func(s statestore.Status) float64 {
		if s.Index == statestore.IndexReady {
			return 1
		}
		return 0
	})
	gauge("index_records", "Records in the index: keys, apps and developers.", func(s statestore.Status) float64 { return float64(s.IndexRecords) })
	counter("index_answers", "Checks answered from the index.", func(s statestore.Status) int64 { return s.Indexed })
	counter("cache_hits", "Records used from the cache.", func(s statestore.Status) int64 { return s.Hits })
	counter("cache_negative_hits", "Keys found in the cache of keys that do not exist.", func(s statestore.Status) int64 { return s.AbsentHits })
	counter("cache_caught_up", "Cached records brought up to date by the one event that they lacked.", func(s statestore.Status) int64 { return s.CaughtUp })
	counter("cache_misses", "Records that had to be loaded.", func(s statestore.Status) int64 { return s.Misses })
	counter("loads", "Reads of records sent to etcd.", func(s statestore.Status) int64 { return s.Loads })
	counter("load_errors", "Reads of records that failed.", func(s statestore.Status) int64 { return s.LoadErrors })
	counter("loads_local", "Reads of records that one member of etcd answered, because no leader did in time.", func(s statestore.Status) int64 { return s.LocalLoads })
	counter("loads_joined", "Checks that shared the load of another.", func(s statestore.Status) int64 { return s.Joined })
	counter("loads_shed", "Loads refused to protect etcd.", func(s statestore.Status) int64 { return s.Shed })
	counter("loads_repeated", "Loads repeated because an event arrived meanwhile.", func(s statestore.Status) int64 { return s.Rereads })
	counter("waits", "Checks that waited for the watch to catch up with a load.", func(s statestore.Status) int64 { return s.Waits })
	counter("snapshots", "Checks that read all their records in one transaction.", func(s statestore.Status) int64 { return s.Snapshots })
	counter("unreadable_records", "Loads of a record that cannot be read.", func(s statestore.Status) int64 { return s.Unreadable })
	counter("events", "Watch events applied.", func(s statestore.Status) int64 { return s.Events })
	counter("events_repeated", "Watch events that had been applied before.", func(s statestore.Status) int64 { return s.Repeated })
	counter("keys_ignored", "Events on keys that the schema does not know.", func(s statestore.Status) int64 { return s.Ignored })
	counter("watch_gaps", "Times that events may have been missed and every record was to be loaded again.", func(s statestore.Status) int64 { return s.Gaps })
	counter("watches_replaced", "Watches that had gone silent.", func(s statestore.Status) int64 { return s.Replaced })
	counter("acknowledgements", "Acknowledgements written for receipts.", func(s statestore.Status) int64 { return s.Acknowledgements })
	counter("acknowledgement_errors", "Acknowledgements that could not be written.", func(s statestore.Status) int64 { return s.AckErrors })
	counter("registrations_lost", "Registrations that failed or ended unasked.", func(s statestore.Status) int64 { return s.Unregistered })
	counter("probes", "Attempts to prove freshness.", func(s statestore.Status) int64 { return s.Probes })
	counter("probe_errors", "Attempts that failed.", func(s statestore.Status) int64 { return s.ProbeErrors })
	return fs
}()

// Describe implements prometheus.Collector.
func (c storeCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, f := range figures {
		ch <- f.desc
	}
}

// Collect implements prometheus.Collector.
func (c storeCollector) Collect(ch chan<- prometheus.Metric) {
	s := c.store.Status()
	for _, f := range figures {
		ch <- prometheus.MustNewConstMetric(f.desc, f.kind, f.value(s))
	}
}

// chainCollector tells how far the audit chain is.
type chainCollector struct{ follower *audit.Follower }

var chainFigures = []struct {
	desc  *prometheus.Desc
	value func(audit.Status) float64
}{
	{prometheus.NewDesc("keygate_audit_chain_revision", "Newest revision that the audit chain covers, as far as this server knows.", nil, nil),
		func(s audit.Status) float64 { return float64(s.Head) }},
	{prometheus.NewDesc("keygate_audit_chain_lag_revisions", "Revisions that wait for a link of the audit chain.", nil, nil),
		func(s audit.Status) float64 { return float64(s.Lag) }},
	{prometheus.NewDesc("keygate_audit_chain_leader", "1 while this server writes the audit chain.", nil, nil),
		func(s audit.Status) float64 {
			if s.Leader {
				return 1
			}
			return 0
		}},
}

// Describe implements prometheus.Collector.
func (c chainCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, f := range chainFigures {
		ch <- f.desc
	}
}

// Collect implements prometheus.Collector.
func (c chainCollector) Collect(ch chan<- prometheus.Metric) {
	s := c.follower.Status()
	for _, f := range chainFigures {
		ch <- prometheus.MustNewConstMetric(f.desc, prometheus.GaugeValue, f.value(s))
	}
}
