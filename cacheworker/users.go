package cacheworker

import (
	"context"
	"maps"
	"reflect"
	"sync"

	"github.com/larderfs/larder/cacheworker/workerpb"
	"github.com/larderfs/larder/master/client"
)

// users are the pods that volumes are published to, as the node plugin tells and the master is told.
type users struct {
	changed chan struct{} // has the master told at once

	mu   sync.Mutex
	pods map[string][]client.Pod // by volume
}

func newUsers() *users { return &users{changed: make(chan struct{}, 1)} }

// Users implements workerpb.WorkerServer.
func (c control) Users(_ context.Context, req *workerpb.UsersRequest) (*workerpb.UsersReply, error) {
	pods := map[string][]client.Pod{}
	for _, v := range req.GetVolumes() {
		for _, p := range v.GetPods() {
			pods[v.GetVolumeId()] = append(pods[v.GetVolumeId()], client.Pod{Namespace: p.GetNamespace(), Name: p.GetName(), UID: p.GetUid()})
		}
	}
	c.w.users.set(pods)
	if ms := c.w.serving.Load(); ms != nil {
		ms.name()
	}
	return &workerpb.UsersReply{}, nil
}

func (u *users) set(pods map[string][]client.Pod) {
	u.mu.Lock()
	same := maps.EqualFunc(u.pods, pods, func(a, b []client.Pod) bool { return reflect.DeepEqual(a, b) })
	u.pods = pods
	u.mu.Unlock()
	if same {
		return
	}
	select {
	case u.changed <- struct{}{}:
	default:
	}
}

// podsOf are those that a volume is published to.
func (u *users) podsOf(volume string) []client.Pod {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.pods[volume]
}

// of adds the pods to volumes.
func (u *users) of(vs []client.Published) []client.Published {
	u.mu.Lock()
	defer u.mu.Unlock()
	for i, v := range vs {
		vs[i].Pods = u.pods[v.Volume.ID]
	}
	return vs
}
