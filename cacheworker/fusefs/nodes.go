package fusefs

import (
	"hash/maphash"
	"iter"
	"slices"
	"strings"
)

// nodeMap finds nodes by id. Ids are given in a row, and so they come back from the log: nodes of a
// row share a page, or a take-over with a million of them would be one cache miss after another.
type nodeMap struct {
	pages map[uint64]*nodePage // by id / pageNodes
	last  *nodePage            // the last one that was added to
	lastN uint64               // its number
	count int
}

type nodePage struct {
	nodes [pageNodes]*node
	used  int
}

const pageNodes = 64

func newNodeMap() nodeMap { return nodeMap{pages: map[uint64]*nodePage{}} }

func (m *nodeMap) get(id uint64) *node {
	p := m.pages[id/pageNodes]
	if p == nil {
		return nil
	}
	return p.nodes[id%pageNodes]
}

// add takes a node whose id is not there.
func (m *nodeMap) add(n *node) {
	page := n.id / pageNodes
	if m.last == nil || m.lastN != page {
		p := m.pages[page]
		if p == nil {
			p = &nodePage{}
			m.pages[page] = p
		}
		m.last, m.lastN = p, page
	}
	m.last.nodes[n.id%pageNodes] = n
	m.last.used++
	m.count++
}

func (m *nodeMap) remove(id uint64) {
	page := id / pageNodes
	p := m.pages[page]
	p.nodes[id%pageNodes] = nil
	m.count--
	if p.used--; p.used == 0 {
		delete(m.pages, page)
		if m.last == p {
			m.last = nil
		}
	}
}

func (m *nodeMap) len() int { return m.count }

// all may see nodes go while it runs.
func (m *nodeMap) all() iter.Seq[*node] {
	return func(yield func(*node) bool) {
		for _, p := range m.pages {
			if !p.all(yield) {
				return
			}
		}
	}
}

// sorted is all, by id.
func (m *nodeMap) sorted() iter.Seq[*node] {
	return func(yield func(*node) bool) {
		numbers := make([]uint64, 0, len(m.pages))
		for page := range m.pages {
			numbers = append(numbers, page)
		}
		slices.Sort(numbers)
		for _, page := range numbers {
			if !m.pages[page].all(yield) {
				return
			}
		}
	}
}

func (p *nodePage) all(yield func(*node) bool) bool {
	for _, n := range p.nodes {
		if n != nil && !yield(n) {
			return false
		}
	}
	return true
}

// nameMap says where a name in a folder leads now. It holds no key beside the nodes.
type nameMap struct {
	seed   maphash.Seed
	byHash map[uint64]*node // the first of those with this hash; the others behind it by sameHash

	unset map[*node]*nodeRow // by folder, what was read and not set yet: that is most of a take-over
	last  *nodeRow           // the last one that was added to; nil if it is not there any more
}

// nodeRow is nodes of a folder in the order in which they were made, by sameHash.
type nodeRow struct{ first, last *node }

func newNameMap() nameMap {
	return nameMap{seed: maphash.MakeSeed(), byHash: map[uint64]*node{}, unset: map[*node]*nodeRow{}}
}

// setLater is set, but when a name in the folder is first asked for. Until then settle has to be
// called before a file there is asked whether it is stale.
func (m *nameMap) setLater(n *node) {
	r := m.last
	if r == nil || r.first.parent != n.parent {
		if r = m.unset[n.parent]; r == nil {
			r = &nodeRow{}
			m.unset[n.parent] = r
		}
		m.last = r
	}
	if r.last == nil {
		r.first = n
	} else {
		r.last.sameHash = n
	}
	r.last = n
}

// settle sets the names in a folder that were to be set later.
func (m *nameMap) settle(folder *node) {
	r := m.unset[folder]
	if r == nil {
		return
	}
	delete(m.unset, folder)
	m.last = nil
	for n := r.first; n != nil; {
		next := n.sameHash
		n.sameHash = nil
		supersedes(n, m.set(n))
		n = next
	}
}

// supersedes notes what it means that a name leads to n and not to the other node any more.
func supersedes(n, was *node) {
	sameObject := n.file != nil && was != nil && was.file != nil && was.file.version == n.file.version && was.file.size == n.file.size &&
		was.file.origin == n.file.origin
	was.supersede(!sameObject)
}

func (m *nameMap) hash(parent uint64, name string) uint64 {
	return maphash.String(m.seed, name) ^ parent*0x9e3779b97f4a7c15
}

func (m *nameMap) get(parent *node, name string) *node {
	m.settle(parent)
	return namesake(m.byHash[m.hash(parent.id, name)], parent, name)
}

func namesake(n, parent *node, name string) *node {
	for n != nil && (n.parent != parent || n.name != name) {
		n = n.sameHash
	}
	return n
}

// set has the name of n lead to it, and returns to which node it led before.
func (m *nameMap) set(n *node) (was *node) {
	m.settle(n.parent)
	h := m.hash(n.parent.id, n.name)
	first := m.byHash[h]
	if was = namesake(first, n.parent, n.name); was != nil {
		first = without(first, was)
	}
	n.sameHash = first
	m.byHash[h] = n
	return was
}

// remove forgets the name of n, if it leads to it.
func (m *nameMap) remove(n *node) {
	m.settle(n.parent)
	h := m.hash(n.parent.id, n.name)
	if first := without(m.byHash[h], n); first == nil {
		delete(m.byHash, h)
	} else {
		m.byHash[h] = first
	}
}

// without takes n out of a row of nodes.
func without(first, n *node) *node {
	for p := &first; *p != nil; p = &(*p).sameHash {
		if *p == n {
			*p, n.sameHash = n.sameHash, nil
			break
		}
	}
	return first
}

func (m *nameMap) all() iter.Seq[*node] {
	return func(yield func(*node) bool) {
		for folder := range m.unset {
			m.settle(folder)
		}
		for _, n := range m.byHash {
			for ; n != nil; n = n.sameHash {
				if !yield(n) {
					return
				}
			}
		}
	}
}

// slab allocates the nodes of files and their texts a good many at once.
type slab struct {
	files []fileNode
	texts strings.Builder
}

type fileNode struct {
	node
	f file
}

const (
	slabFiles = 64
	slabTexts = 16 << 10
)

func (s *slab) file() *node {
	if len(s.files) == 0 {
		s.files = make([]fileNode, slabFiles)
	}
	n := &s.files[0]
	s.files = s.files[1:]
	n.node.file = &n.f
	return &n.node
}

func (s *slab) text(b []byte) string {
	if s.texts.Cap()-s.texts.Len() < len(b) {
		s.texts = strings.Builder{}
		s.texts.Grow(slabTexts)
	}
	from := s.texts.Len()
	s.texts.Write(b)
	return s.texts.String()[from:]
}
