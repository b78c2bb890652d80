package cacheworker

import (
	"reflect"
	"testing"

	"github.com/larderfs/larder/cacheworker/workerpb"
	"github.com/larderfs/larder/master/client"
)

func TestTheMasterIsToldThePodsThatTheNodePluginTold(t *testing.T) {
	w := &Worker{users: newUsers()}
	tell := func(of ...*workerpb.VolumeUsers) (news bool) {
		t.Helper()
		if _, err := (control{w: w}).Users(t.Context(), &workerpb.UsersRequest{Volumes: of}); err != nil {
			t.Fatal(err)
		}
		select {
		case <-w.users.changed:
			return true
		default:
			return false
		}
	}
	published := func() []client.Published {
		return w.users.of([]client.Published{{Volume: client.Volume{ID: "v"}}, {Volume: client.Volume{ID: "idle"}}})
	}
	one := &workerpb.VolumeUsers{VolumeId: "v", Pods: []*workerpb.Pod{{Namespace: "ns", Name: "a", Uid: "1"}, {Uid: "2"}}}
	strange := &workerpb.VolumeUsers{VolumeId: "not here", Pods: one.Pods}
	want := []client.Published{{Volume: client.Volume{ID: "v"}, Pods: []client.Pod{{Namespace: "ns", Name: "a", UID: "1"}, {UID: "2"}}}, {Volume: client.Volume{ID: "idle"}}}
	if !tell(one, strange) || tell(one, strange) {
		t.Error("the master is told at once what changed, and only that")
	}
	if got := published(); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v; want %+v", got, want)
	}
	if want[0].Pods = nil; !tell() || !reflect.DeepEqual(published(), want) {
		t.Errorf("forgotten: %+v", published())
	}
}
