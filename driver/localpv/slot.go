package localpv

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/larderfs/larder/driver"
)

// StorageClass of the PersistentVolumes.
const StorageClass = "larder-local"

// What a PersistentVolume has on it. Claims select by LabelDataset.
const (
	LabelDataset = driver.Name + "/dataset"
	LabelNode    = driver.Name + "/node"
	LabelSlot    = driver.Name + "/slot"

	annotationParameters = driver.Name + "/parameters"
	annotationSecret     = driver.Name + "/secret"

	// With it, and reclaim policy Delete, Kubernetes' own controller leaves a released volume to us.
	annotationProvisioner = "pv.kubernetes.io/provisioned-by"
	provisioner           = "local." + driver.Name
)

// nominal is the size of every volume: what a claim requests has no meaning for a dataset.
const nominal = "1Ei"

// slot is one offer of a dataset. Its name is used once: of the PersistentVolume, of the volume,
// of its directory.
type slot struct {
	name       string
	dataset    string
	number     int
	secret     string
	parameters map[string]string

	pv *corev1.PersistentVolume // nil for one that is about to be made
}

// newSlot names an offer that never was before.
func newSlot(d dataset, number int, node string) slot {
	sum := sha256.Sum256([]byte(node))
	return slot{
		name:    fmt.Sprintf("%s%s-%x-%d-%s", driver.LocalPrefix, d.name, sum[:3], number, strings.ToLower(rand.Text()[:6])),
		dataset: d.name, number: number, secret: d.secret, parameters: d.parameters,
	}
}

// slotOf reads what volume wrote.
func slotOf(pv *corev1.PersistentVolume) (slot, error) {
	s := slot{name: pv.Name, dataset: pv.Labels[LabelDataset], secret: pv.Annotations[annotationSecret], pv: pv}
	var err error
	if s.number, err = strconv.Atoi(pv.Labels[LabelSlot]); err != nil || s.dataset == "" || !strings.HasPrefix(s.name, driver.LocalPrefix) {
		return s, fmt.Errorf("persistent volume %s has our label %s, but is not one that we made; take the label away", pv.Name, LabelNode)
	}
	if err := json.Unmarshal([]byte(pv.Annotations[annotationParameters]), &s.parameters); err != nil {
		return s, fmt.Errorf("persistent volume %s: annotation %s is damaged; delete the volume when it is released", pv.Name, annotationParameters)
	}
	return s, nil
}

// volume is the PersistentVolume that offers a slot below dir on a node.
func (s slot) volume(dir string, node *corev1.Node) (*corev1.PersistentVolume, error) {
	parameters, err := json.Marshal(s.parameters)
	if err != nil {
		return nil, err
	}
	host := node.Labels[corev1.LabelHostname]
	if host == "" {
		host = node.Name
	}
	mode := corev1.PersistentVolumeFilesystem
	return &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{
			Name:   s.name,
			Labels: map[string]string{LabelDataset: s.dataset, LabelNode: nodeLabel(node.Name), LabelSlot: strconv.Itoa(s.number)},
			Annotations: map[string]string{
				annotationParameters: string(parameters), annotationSecret: s.secret, annotationProvisioner: provisioner,
			},
			// Kubernetes collects the volume when the node has gone, for good.
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID}},
		},
		Spec: corev1.PersistentVolumeSpec{
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(nominal)},
			AccessModes:                   []corev1.PersistentVolumeAccessMode{corev1.ReadOnlyMany, corev1.ReadWriteOnce},
			VolumeMode:                    &mode,
			StorageClassName:              StorageClass,
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimDelete,
			PersistentVolumeSource:        corev1.PersistentVolumeSource{Local: &corev1.LocalVolumeSource{Path: shown(dir, s.name)}},
			NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
				MatchExpressions: []corev1.NodeSelectorRequirement{{Key: corev1.LabelHostname, Operator: corev1.NodeSelectorOpIn, Values: []string{host}}},
			}}}},
		},
	}, nil
}

// nodeLabel is the node's name where it is short enough for a label.
func nodeLabel(node string) string {
	if len(node) <= 63 {
		return node
	}
	sum := sha256.Sum256([]byte(node))
	return fmt.Sprintf("%x", sum[:16])
}

// taken reports whether a claim has the volume, or is about to have it.
func taken(pv *corev1.PersistentVolume) bool { return pv.Spec.ClaimRef != nil }

// released reports whether the volume had a claim and is to be used no more.
func released(pv *corev1.PersistentVolume) bool {
	return pv.Status.Phase == corev1.VolumeReleased || pv.Status.Phase == corev1.VolumeFailed
}

// A slot's directory has the mount point and, beside it, the path that Kubernetes is told: a
// link that leads through the mounted file system, and so nowhere while nothing is mounted.
// The kubelet would bind an empty directory for a pod, and the pod take it for an empty dataset.
func mountPoint(dir, name string) string { return filepath.Join(dir, name, "mnt") }
func shown(dir, name string) string      { return filepath.Join(dir, name, "volume") }

const link = "mnt/domain/.."
