// Package localpv offers datasets as local PersistentVolumes, for clusters that forbid inline
// CSI volumes.
//
// Datasets are entries of a ConfigMap. Per dataset and node there are N slots; each is a FUSE
// mount with data/ and a domain socket of its own, and a PersistentVolume whose path it is. A
// slot is offered once: when its claim has gone, its mount and its PersistentVolume are
// removed and another slot is made, under another name, at another path, with another socket.
// To clear the claim of a released volume would be less work, but whoever remembers the old
// volume (a kubelet with a pod that was deleted by force, a controller's memory) would mean
// the next tenant's by the same name.
//
// Nothing is remembered: what is offered is asked of the PersistentVolumes, what is mounted of
// the broker and the kernel. Every step can be the last one before a SIGKILL.
package localpv

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/larderfs/larder/driver"
	"github.com/larderfs/larder/driver/kube"
)

// Config of the slots of one node.
type Config struct {
	Node       string
	Datasets   string // the ConfigMap, as namespace/name; Secrets are in the same namespace
	Dir        string // of the slots' directories; the kubelet sees it at the same path
	KubeletDir string // the kubelet's root directory
	FileRoot   string // file:// sources must be below it; "" allows none
	Log        *slog.Logger
}

// Validate reports all mistakes at once.
func (c Config) Validate() error {
	var errs []error
	if space, name, ok := strings.Cut(c.Datasets, "/"); !ok || space == "" || name == "" || strings.Contains(name, "/") {
		errs = append(errs, fmt.Errorf("local volumes: ConfigMap %q: want namespace/name", c.Datasets))
	}
	if c.Node == "" {
		errs = append(errs, errors.New("local volumes: the node's name is missing"))
	}
	for _, dir := range []string{c.Dir, c.KubeletDir} {
		if !filepath.IsAbs(dir) {
			errs = append(errs, fmt.Errorf("local volumes: directory %q is not an absolute path", dir))
		}
	}
	return errors.Join(errs...)
}

// Controller keeps the slots of one node.
type Controller struct {
	cfg        Config
	namespace  string
	configMap  string
	cluster    *kube.Client
	broker     driver.Broker
	pods       driver.Pods
	events     *kube.Recorder
	parameters driver.Parameters
	wake       chan struct{}

	mu    sync.Mutex // guards the fields below; never held across a call
	world world
	ended bool   // see Withdraw
	stop  func() // ends the watches; nil before Run

	// What only the round under way touches.
	made    map[string]slot      // that were created and have not come back by the watch
	applied map[string]string    // the version of the Secret that a mount has, by slot
	retries map[string]*retry    // of what cannot be mounted, by what is tried
	orphans map[string]time.Time // slots that are mounted and that the broker does not hold, since they were seen
	told    map[string]string    // what the log has been told of slots, by name
}

// world is what the API server says. A field is nil until it is known.
type world struct {
	configMaps *[]*corev1.ConfigMap // none or one
	secrets    *[]*corev1.Secret
	volumes    *[]*corev1.PersistentVolume // of this node
}

func (w world) known() bool { return w.configMaps != nil && w.secrets != nil && w.volumes != nil }

// New checks the configuration.
func New(cfg Config, cluster *kube.Client, broker driver.Broker, pods driver.Pods, events *kube.Recorder) (*Controller, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	p, err := driver.NewParameters(cfg.FileRoot)
	if err != nil {
		return nil, err
	}
	c := &Controller{cfg: cfg, cluster: cluster, broker: broker, pods: pods, events: events, parameters: p, wake: make(chan struct{}, 1),
		made: map[string]slot{}, applied: map[string]string{}, retries: map[string]*retry{}, told: map[string]string{}, orphans: map[string]time.Time{}}
	c.namespace, c.configMap, _ = strings.Cut(cfg.Datasets, "/")
	return c, nil
}

const (
	interval = 10 * time.Second // between looks at what nobody tells of: a mount that died
	soon     = time.Second      // when something is waited for
)

// Run keeps the slots until ctx ends. They stay then: pods use them.
func (c *Controller) Run(ctx context.Context) error {
	g, all := errgroup.WithContext(ctx)
	ctx, cancel := context.WithCancel(all)
	defer cancel()
	c.mu.Lock()
	c.stop = cancel
	c.mu.Unlock()
	g.Go(func() error {
		one := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", c.configMap).String()}
		c.cluster.ConfigMaps(c.namespace).Follow(ctx, one, func(l []*corev1.ConfigMap) { c.learn(func(w *world) { w.configMaps = &l }) })
		return nil
	})
	g.Go(func() error {
		c.cluster.Secrets(c.namespace).Follow(ctx, metav1.ListOptions{}, func(l []*corev1.Secret) { c.learn(func(w *world) { w.secrets = &l }) })
		return nil
	})
	g.Go(func() error {
		ours := metav1.ListOptions{LabelSelector: labels.Set{LabelNode: nodeLabel(c.cfg.Node)}.String()}
		c.cluster.PersistentVolumes().Follow(ctx, ours, func(l []*corev1.PersistentVolume) { c.learn(func(w *world) { w.volumes = &l }) })
		return nil
	})
	g.Go(func() error { c.keep(all); return nil })
	return g.Wait()
}

func (c *Controller) learn(change func(*world)) {
	c.mu.Lock()
	change(&c.world)
	c.mu.Unlock()
	c.Wake()
}

// unwatch is for who has lost the right to: client-go would ask, and log, for ever.
func (c *Controller) unwatch() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stop != nil {
		c.stop()
	}
}

// Wake has everything looked at now.
func (c *Controller) Wake() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Withdraw takes back what nobody uses, and offers nothing any more.
func (c *Controller) Withdraw() {
	c.mu.Lock()
	c.ended = true
	c.mu.Unlock()
	c.Wake()
}

func (c *Controller) keep(ctx context.Context) {
	for ctx.Err() == nil {
		c.mu.Lock()
		w, ended := c.world, c.ended
		c.mu.Unlock()
		next := interval
		if w.known() {
			again, err := c.round(ctx, w, ended)
			if err != nil && ctx.Err() == nil {
				c.cfg.Log.Warn("local volumes", "err", err)
			}
			if again || err != nil {
				next = soon
			}
		}
		t := time.NewTimer(next)
		select {
		case <-ctx.Done():
		case <-t.C:
		case <-c.wake:
		}
		t.Stop()
	}
}
